"""A claim one of whose runs takes its process along; in a module of its own, since the new process imports it."""

import os

from claims.frame import Claim, Side


class Dying(Claim):
    name, paper, text = "dying", "0000.00000", "Nothing."
    sides = (Side("only", ({"beta": 1.0}, {"beta": 2.0}, {"beta": 3.0})),)
    seeds = 1

    def execute(self, world, run):
        if run.setting == 1:
            os._exit(9)
        return {"points": []}
