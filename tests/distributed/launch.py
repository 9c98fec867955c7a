"""
Runs cases in two processes on gloo, one after the other in the same processes.

Importing torch and TRL takes ten times as long as a case does, hence one launch for all cases of a strategy. What a case returns in
each process is kept in a file, so that the cases before a failure count.
"""

import contextlib
import gc
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # what a process waits for the other before it gives up
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}


def in_two_processes(strategy: str, model_dir: Path, folder: Path, names: list[str]) -> tuple[dict[str, list], str]:
    """What each case returned in the two processes, and the error that ended the launch, if one did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.launch", strategy, str(model_dir), str(folder), *names]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "TEST_STRATEGY": strategy,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    folder.mkdir(parents=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    files = {name: [folder / f"{name}-{rank}.pt" for rank in range(2)] for name in names}
    results = {
        name: [torch.load(path, weights_only=False) for path in paths]
        for name, paths in files.items()
        if all(path.exists() for path in paths)
    }
    errors = [path.read_text() for path in sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)]
    return results, "\n".join(errors) or done.stderr[-4000:]


@contextlib.contextmanager
def fully_sharded():
    """FSDP2 on a CPU: accelerate would take the plugin on GPUs alone."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    before = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        fresh = "fsdp_plugin" not in AcceleratorState._shared_state
        before(self, *args, **kwargs)
        if fresh:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
                state_dict_type="FULL_STATE_DICT",
            )

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


@contextlib.contextmanager
def partitioned():
    """ZeRO-3 on a CPU, without the communication op whose build takes minutes."""
    import deepspeed.ops
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.NO)):
        yield


STRATEGIES = {"ddp": contextlib.nullcontext, "fsdp": fully_sharded, "zero": partitioned}


def main(strategy: str, model_dir: str, folder: str, *names: str) -> None:
    from tests.distributed.cases import CASES

    gc.freeze()  # as tests/conftest.py does
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    for name in names:
        try:
            with STRATEGIES[strategy]():
                result = CASES[strategy][name](Path(model_dir), Path(folder) / name)
        except BaseException:
            Path(f"{folder}/{name}-{rank}.error").write_text(traceback.format_exc())
            raise
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
