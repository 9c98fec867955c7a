"""
Runs cases in two processes on gloo, one after the other in the same processes, and compares them with one process.

Importing torch and TRL takes ten times as long as a case does, hence one launch for all cases of a strategy. A case is a
function `(model_dir, folder) -> dict`, called in every process; what each returned is kept in a file, so that the cases before a
failure count.
"""

import contextlib
import importlib
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


def in_two_processes(module: str, strategy: str, model_dir: Path, folder: Path, names: list[str]) -> tuple[dict, str]:
    """What each case returned in each process, and the error that ended the launch, if one did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.launch", module, strategy, str(model_dir), str(folder), *names]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "TEST_STRATEGY": strategy,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
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
    return results, "\n".join(errors) or (done.stderr[-4000:] if done.returncode else "")


def compare(
    subtests, module: str, strategy: str, model_dir: Path, folder: Path, tolerance: dict | None = None
) -> None:
    """Each case of a module that knows the strategy: the first process of two against the only one."""
    cases = importlib.import_module(module).CASES[strategy]
    two, error = in_two_processes(module, strategy, model_dir, folder / "two", list(cases))
    for name, case in cases.items():
        with subtests.test(name):
            assert name in two, f"no result of {name!r} in two processes:\n{error}"
            one = case(model_dir, folder / "one" / name)
            assert_close(two[name][0], one, tolerance or {"rtol": 1e-4, "atol": 2e-6})


def assert_close(two, one, tolerance: dict, where: str = "") -> None:
    """Equal structure, and numbers that are equal within the tolerance."""
    if isinstance(one, dict):
        assert two.keys() == one.keys(), f"{where}: {sorted(two.keys() ^ one.keys())} is in one of the two only"
        for key in one:
            assert_close(two[key], one[key], tolerance, f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(two) == len(one), f"{where}: {len(two)} entries in two processes, {len(one)} in one"
        for index, pair in enumerate(zip(two, one, strict=True)):
            assert_close(*pair, tolerance, f"{where}/{index}")
    elif isinstance(one, (float, torch.Tensor)):
        values = [torch.as_tensor(value, dtype=torch.float64) for value in (two, one)]
        torch.testing.assert_close(*values, **tolerance, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert two == one, f"{where}: {two!r} in two processes, {one!r} in one"


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


def main(module: str, strategy: str, model_dir: str, folder: str, *names: str) -> None:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    cases = importlib.import_module(module).CASES[strategy]
    for name in names:
        try:
            with STRATEGIES[strategy]():
                result = cases[name](Path(model_dir), Path(folder) / name)
        except BaseException:
            Path(f"{folder}/{name}-{rank}.error").write_text(traceback.format_exc())
            raise
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
