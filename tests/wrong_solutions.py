"""Wrong solutions of the notebooks' exercises: (code, a part of the message that it gets), by exercise."""

WRONG: dict[str, list[tuple[str, str]]] = {}
