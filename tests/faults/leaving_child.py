"""A program whose child, spawned and named as the first argument says, ends as the second says."""

import atexit
import multiprocessing
import sys

from lvllm.faults.leaving import leave_after_the_work


class Witness:
    """Says so when the interpreter is taken apart."""

    def __del__(self) -> None:
        print("taken apart", flush=True)


def work(how: str) -> None:
    leave_after_the_work()
    atexit.register(print, "exit handler")
    sys.modules["witness"] = Witness()  # type: ignore[assignment]
    print("worked")  # without a flush
    match how:
        case "returns":
            return
        case "exits":
            sys.exit(3)
        case "says":
            sys.exit("a line")
        case "fails":
            raise ValueError("the reason")


if __name__ == "__main__":
    name, how = sys.argv[1:]
    multiprocessing.set_start_method("spawn")
    process = multiprocessing.Process(target=work, args=(how,), name=name)
    process.start()
    process.join()
    sys.exit(process.exitcode)
