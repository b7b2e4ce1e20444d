"""The subcommands of `graft-server`: what each takes, what it prints, how it ends."""
