"""Fractions and times for people."""


def percent(fraction: float) -> str:
    """Returns a fraction as percent, rounded down: never 100 % before the end."""
    return f"{int(fraction * 100)}%"


def times(elapsed_s: float, remaining_s: float | None) -> str:
    """Returns how long a stage has taken, and how long it may still take where that is known."""
    text = clock(elapsed_s)
    if remaining_s is not None and remaining_s >= 1:
        text += f", about {clock(remaining_s)} left"
    return text


def clock(seconds: float) -> str:
    """Returns seconds as M:SS, or as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
