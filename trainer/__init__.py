"""The trainer: a process of its own, and the only place where torch lives."""
