"""Our classes in TRL's place, for scripts that nobody edits."""

import importlib
import sys
import warnings


# Our classes, and the TRL packages that offer them; those of an experimental package are patched where it is there
STABLE = {"DPOConfig": "trl_ext.trainers.dpo_config", "DPOTrainer": "trl_ext.trainers.dpo"}
ONLINE = {"OnlineDPOConfig": "trl_ext.trainers.online.config", "OnlineDPOTrainer": "trl_ext.trainers.online.trainer"}


def patch_trl() -> None:
    """
    Make `DPOConfig`, `DPOTrainer`, `OnlineDPOConfig` and `OnlineDPOTrainer` this package's classes, wherever TRL offers
    them.

    Call it before a script imports them; `trl-ext run` does. Calling it again changes nothing.
    """
    import trl
    import trl.trainer
    import trl.trainer.dpo_config
    import trl.trainer.dpo_trainer

    _replace(STABLE, (trl, trl.trainer))
    try:
        with warnings.catch_warnings():  # that it is experimental is for the script that asks for it to hear
            warnings.simplefilter("ignore")
            import trl.experimental.online_dpo as online
    except ImportError:  # a TRL that has dropped it
        return
    _replace(ONLINE, (online,))


def _replace(classes: dict[str, str], packages: tuple) -> None:
    for name, origin in classes.items():
        ours = getattr(importlib.import_module(origin), name)
        for module_name, module in list(sys.modules.items()):
            if (module_name == "trl" or module_name.startswith("trl.")) and name in vars(module):
                setattr(module, name, ours)
        # TRL's packages are lazy: an attribute that nobody asked for yet is not in `vars`
        for package in packages:
            setattr(package, name, ours)
