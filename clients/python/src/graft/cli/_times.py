"""Fractions and times for people."""


def percent(fraction: float) -> str:
    """As people read it: never 100 % before the end."""
    return f"{int(fraction * 100)}%"


def times(elapsed_s: float, remaining_s: float | None) -> str:
    """How long a stage takes already, and for how long still; a time that is over is not told."""
    text = clock(elapsed_s)
    if remaining_s is not None and remaining_s >= 1:
        text += f", about {clock(remaining_s)} left"
    return text


def clock(seconds: float) -> str:
    """M:SS, or H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
