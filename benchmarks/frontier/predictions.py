"""What theory lets one expect of each setting, written before it ran; the report has it beside what came out.

In theory (the paper's section 3) noise of the gradients drives parameters along minimizers toward flatter ones, and
rounds that are long beside 1 / lr let it count K times. That asks for noise at the minimizers, and for time: the drift
goes with the square of the rate.
"""

from __future__ import annotations

PREDICTED = {
    "4,000 steps": "less ahead of parallel than in 16,000 steps; QSR and constant H alike, as there",
    "1,000 steps": "no time for the drift: none ahead of parallel",
    "no label noise": "no noise is left at the minimizers, so no drift: all alike",
    "cross-entropy": "as with the squared error, for the labels' noise is the same",
    "K = 2": "the drift counts twice and not 8 times: a smaller gain over parallel",
    "K = 16": "a larger gain over parallel than with 8",
    "momentum 0.9": "as SGD at ten times the rate: no other order",
    "AdamW": "steps do not shrink with the gradient, so workers part further: long rounds at the peak harm, QSR ahead",
    "AdamW, moments every 3rd and 6th round": "between AdamW's local steps and parallel",
    "three hidden layers": "sharper, so long rounds at the peak harm more: QSR ahead of constant H",
    "three hidden layers, 8,000 steps": "written after 4,000 steps: with time for the drift QSR ahead of parallel too",
    "hidden 128": "more minimizers to drift along: a larger gain over parallel than with 32",
    "sparse": "the longer the rounds the better; rules alike at equal averagings; one averaging at the end the best",
    "sensing": "as sparse: the longer the better, rules alike, for nothing harms long rounds at a rate that is stable",
    "cifar10": "64 epochs and little noise: a small gain over parallel, rules alike",
    "Muon": "a step's size does not depend on the gradient's: long rounds at the peak harm, QSR ahead of constant H",
    "fixed rate": "4 and 8 times parallel's best rate: the shorter the first round, the less is lost; power 3 loses "
    "least, then QSR, power 1, constant H",
}
