"""
Runs cases in several processes on gloo, one after the other in the same processes.

Importing torch and TRL takes ten times as long as a case does, hence one launch for all cases of a strategy, whose processes are
forked from one that has imported them. What a case returns in each process is kept in a file, so that the cases before a failure
count.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # what a process waits for the others before it gives up
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
# What the cases need; they themselves read the environment when they are imported
MODULES = (
    "peft",
    "torch.distributed.fsdp",
    "trl_ext.trainers.dpo",
    "trl_ext.trainers.online.trainer",
    "trl_ext.rounds.iterate",
)


def in_processes(
    strategy: str, count: int, model_dir: Path, folder: Path, names: list[str]
) -> tuple[dict[str, list], dict[str, str]]:
    """What each case returned in the processes, and the errors of those that failed. A failure ends a launch: the rest has another."""
    results, errors = {}, {}
    while names:
        here = folder / str(len(errors))
        here.mkdir(parents=True)
        command = [
            sys.executable,
            "-m",
            "tests.distributed.launch",
            strategy,
            str(count),
            str(model_dir),
            str(here),
            *names,
        ]
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "TEST_STRATEGY": strategy,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        found = {name: [here / f"{name}-{rank}.pt" for rank in range(count)] for name in names}
        results |= {
            name: [torch.load(path, weights_only=False) for path in paths]
            for name, paths in found.items()
            if all(path.exists() for path in paths)
        }
        failed = next((name for name in names if name not in results), None)
        if failed is None:
            break
        said = sorted(here.glob("*.error"), key=lambda path: path.stat().st_mtime)
        errors[failed] = "\n".join(path.read_text() for path in said) or done.stderr[-4000:]
        names = names[names.index(failed) + 1 :]
    return results, errors


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
    """ZeRO on a CPU, without the communication op whose build takes minutes."""
    import deepspeed.ops
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.NO)):
        yield


STRATEGIES = {"ddp": contextlib.nullcontext, "fsdp": fully_sharded, "zero2": partitioned, "zero3": partitioned}


def child(strategy: str, rank: int, count: int, model_dir: str, folder: str, names: list[str]) -> None:
    """One process: all cases, until one fails."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # read by accelerate and not used: a file is the store
    store = f"file://{folder}/store"
    wait = timedelta(seconds=SECONDS)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=wait)
    from tests.distributed.runs import CASES

    for name in names:
        try:
            with STRATEGIES[strategy]():
                result = CASES[name](Path(model_dir), Path(folder) / name)
        except BaseException:
            Path(f"{folder}/{name}-{rank}.error").write_text(traceback.format_exc())
            raise
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(strategy: str, count: str, model_dir: str, folder: str, *names: str) -> None:
    for name in (*MODULES, *(["deepspeed"] if strategy.startswith("zero") else [])):
        importlib.import_module(name)
    gc.freeze()  # as tests/conftest.py does
    children = []
    for rank in range(int(count)):
        number = os.fork()
        if not number:
            code = 1
            try:
                child(strategy, rank, int(count), model_dir, folder, list(names))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(number)
    while children:
        number, code = os.wait()
        children.remove(number)
        if code:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
