"""The serving process: answers RPCs, keeps models and jobs, starts trainers. Without torch."""
