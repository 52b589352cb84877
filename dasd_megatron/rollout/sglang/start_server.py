"""Start SGLang, as ``sglang.launch_server`` does, with the interpreter of SGLang's own environment.

    python start_server.py cuda|cpu ARGUMENTS

The server ends when standard input is closed, and so with the process that started it. On ``cpu``, stand-ins take the
place of modules that SGLang imports there but does not need: its kernels and Triton. Their attributes exist, and fail
when they are used. The API key comes from DASD_API_KEY, since everybody on the machine can read a command line. SGLang
writes its settings into its log, and the key is blotted out there. This file imports nothing of this package, since
SGLang's environment does not have it.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def prepare_cpu() -> Any:
    """Put the stand-ins in place and mend what SGLang's plain CPU path lacks.

    Returns an object that has to live as long as the process, since definitions of operators are undone with it.
    """
    sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # A few small functions are compiled otherwise, which takes a C++ compiler and asks Triton what it can do.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    # torchvision's Python code registers kernels for these; the library that declares them is built for another torch.
    torchvision = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    # SGLang heeds sampling_seed under --enable-deterministic-inference alone. The matrix products of that mode are
    # Triton kernels. PyTorch's own, which run here, give the same bits for the same batch, so equal seeds give equal
    # draws as long as the batches are equal.
    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *_args, **_kwargs: None
    return torchvision


def keep_out_of_logs(secret: str) -> None:
    """Replace ``secret`` by asterisks in every log record of this process."""
    make_record = logging.getLogRecordFactory()

    def without_secret(*args, **kwargs):
        record = make_record(*args, **kwargs)
        message = record.getMessage()
        if secret in message:
            record.msg, record.args = message.replace(secret, "***"), None
        return record

    logging.setLogRecordFactory(without_secret)


# This and what follows is not in main because the processes that SGLang spawns need it too. They import this file
# again, under another name.
# A start that takes too long is asked where it stands.
faulthandler.register(signal.SIGUSR2)
if sys.argv[1:2] == ["cpu"]:
    _DEFINITIONS = prepare_cpu()
API_KEY = os.environ.get("DASD_API_KEY")
if API_KEY is not None:
    keep_out_of_logs(API_KEY)


def main() -> None:
    """Start an SGLang server, which ends when its standard input does."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    def end_with_standard_input() -> None:
        while os.read(0, 1024):
            pass
        kill_process_tree(os.getpid(), include_parent=True)

    threading.Thread(target=end_with_standard_input, daemon=True).start()
    try:
        run_server(prepare_server_args(sys.argv[2:] + ([] if API_KEY is None else ["--api-key", API_KEY])))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
