"""A process that has imported everything and forks for each run, so that hundreds of runs don't import jax hundreds of
times: `python -m tests.faults.zygote`, one JSON command a line on stdin, one JSON answer a line on stdout.

    {"arguments": [...], "log": FILE, "fault": null | {"at": EVENT, "match": TEXT, "count": 1, "do": WHAT}}
    {"code": the exit code, or minus the signal that ended it}

The child is the real program, `python -m sftjax.main ARGUMENTS` as far as it can tell. A fault comes about at an audit
event (`storage.moment` names them "sftjax.NAME"; Python itself has "open", "os.rename", ...): at the COUNTth whose name
is EVENT and whose details contain TEXT.
"""

import errno
import json
import os
import runpy
import signal
import sys


def strike(what: str) -> None:
    """Brings the fault about."""
    if what == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if what == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if what == "exit":  # the machine is gone: no handler, no clean-up
        os._exit(99)
    os.kill(os.getpid(), getattr(signal, what))


def arm(at: str, match: str, count: int, do: str) -> None:
    left = count

    def hook(event: str, details: tuple) -> None:
        nonlocal left
        if event == at and left and match in " ".join(map(str, details)):
            left -= 1
            if not left:
                strike(do)

    sys.addaudithook(hook)


def run(arguments: list[str], log: str, fault: dict | None) -> None:
    """In the child; never returns."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if fault:
        arm(**fault)
    sys.argv = ["sftjax.main", *arguments]
    sys.modules.pop("sftjax.main", None)
    code = 1
    try:
        runpy.run_module("sftjax.main", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import sftjax.sweep
    import sftjax.train  # noqa: F401  # what every run imports

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**command)
        print(json.dumps({"pid": child}), file=answers, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code}), file=answers, flush=True)


if __name__ == "__main__":
    main()
