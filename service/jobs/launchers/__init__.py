"""Ways to start trainers, all behind the interface `Launcher` in `process`."""
