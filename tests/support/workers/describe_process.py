"""Print what this process is, for a comparison of a forked process with a started one; then end as asked."""

import json
import os
import signal
import sys
import threading

import psutil

mine = psutil.Process()
print(
    json.dumps(
        {
            "arguments": sys.argv,
            "name": __name__,
            "file": __file__,
            "folder": sys.path[0],
            "path": sys.path,
            "directory": os.getcwd(),
            "variable": os.environ.get("DASD_TEST_VARIABLE"),
            "variables": sorted(set(os.environ) - {"DASD_TEST_VARIABLE"}),
            "shown": mine.environ().get("DASD_TEST_VARIABLE"),
            "command": [word for word in mine.cmdline() if word],
            "parent": os.getppid(),
            "leads_session": os.getsid(0) == os.getpid(),
            "mask": os.umask(0),
            "blocked": sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "ignored": [int(number) for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN],
            "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "threads": threading.active_count(),
            "input": sys.stdin.read() if not sys.stdin.isatty() else None,
        }
    ),
    flush=True,
)
print("an error", file=sys.stderr)
end = sys.argv[1] if len(sys.argv) > 1 else ""
if end == "fail":
    raise RuntimeError("on purpose")
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
if end == "thread":
    threading.Thread(target=lambda: print("the last word")).start()
if end == "text":
    sys.exit("a reason")
sys.exit(7 if end == "seven" else 0)
