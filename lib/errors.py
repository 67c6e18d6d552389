"""The one kind of error that people see: a sentence of what is wrong and a sentence of the cure."""


class CourseError(Exception):
    """What is wrong (naming the file) and its cure, shown without a traceback."""

    def __init__(self, what: str, cure: str):
        super().__init__(f"{what}\n{cure}")
        self.what = what
        self.cure = cure

    def __reduce__(self):
        """So that it reaches people from a worker process as well."""
        return type(self), (self.what, self.cure)
