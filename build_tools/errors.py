"""The exception that stops a build."""

# Begins the build's own error line, so that it is found among those of pip and the compiler.
PREFIX = "lvllm build: "


class BuildError(SystemExit):
    """The build cannot go on; `line` tells the user why and what to do.

    It is a SystemExit, so setuptools, pip and make show the line alone, without a traceback.
    """

    def __init__(self, line: str) -> None:
        super().__init__(PREFIX + line)
