"""lad_dist.utils.errors."""

MAX_REASON = 120  # characters of a library's complaint


def first_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return (said if len(said) <= MAX_REASON else f"{said[:MAX_REASON]}…").rstrip(".") or type(error).__name__
