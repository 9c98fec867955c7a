"""Our classes in TRL's place, for scripts that nobody edits."""

import sys


def patch_trl() -> None:
    """
    Make `trl.DPOConfig` and `trl.DPOTrainer` this package's classes, wherever TRL offers them.

    Call it before a script imports them; `trl-ext run` does. Calling it again changes nothing.
    """
    import trl
    import trl.trainer
    import trl.trainer.dpo_config
    import trl.trainer.dpo_trainer

    from trl_ext.trainers.dpo import DPOTrainer
    from trl_ext.trainers.dpo_config import DPOConfig

    for ours in (DPOConfig, DPOTrainer):
        for name, module in list(sys.modules.items()):
            if (name == "trl" or name.startswith("trl.")) and ours.__name__ in vars(module):
                setattr(module, ours.__name__, ours)
        # TRL's packages are lazy: an attribute that nobody asked for yet is not in `vars`
        for module in (trl, trl.trainer):
            setattr(module, ours.__name__, ours)
