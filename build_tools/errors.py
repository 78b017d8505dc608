"""The one way a build stops."""

# Tells the build's own line from those of pip and the compiler around it.
PREFIX = "lvllm build: "


class BuildError(SystemExit):
    """The build cannot go on; `line` tells the user why and what to do.

    A SystemExit, so that setuptools, pip and make show the line alone, without a traceback.
    """

    def __init__(self, line: str) -> None:
        super().__init__(PREFIX + line)
