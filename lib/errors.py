"""The one kind of error that people see: a sentence of what is wrong and a sentence of the cure."""

from collections.abc import Iterable


class CourseError(Exception):
    """What is wrong (naming the file) and its cure, shown without a traceback; `code`: its row in `refusals`."""

    def __init__(self, what: str, cure: str, code: str = ""):
        super().__init__(f"{what}\n{cure}")
        self.what = what
        self.cure = cure
        self.code = code

    def __reduce__(self):
        """So that it reaches people from a worker process as well."""
        return type(self), (self.what, self.cure, self.code)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise CourseError(f"{name} is {value!r}.", f"It may be: {', '.join(choices)}.")


def check_least(name: str, value: float, least: float) -> None:
    """Refuse a number below the least, and one that is not finite."""
    if not least <= value < float("inf"):
        raise CourseError(f"{name} is {value}.", f"Give a number of at least {least:g}.")


def check_multiple(name: str, value: int, unit: int) -> None:
    """Refuse a number that is no multiple of a unit, and one below it."""
    check_least(name, value, unit)
    if value % unit:
        raise CourseError(f"{name} is {value}.", f"Give a multiple of {unit}.")
