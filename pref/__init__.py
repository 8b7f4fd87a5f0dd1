"""What the stages share, in rooms with one job each.

files      reading, checking and writing files; errors for users. No torch.
model      tokens in, log-probabilities out
training   the mechanisms behind train_pref.py
answering  the mechanisms behind gen_mtbench.py
judging    the mechanisms behind judge.py
analysis   the mechanisms behind analyze.py
sweeping   what sweep.sh runs

Imports run one way: files <- model <- training, answering, judging <- stages <- sweeping; files <-
analysis.
"""

from pathlib import Path

__version__ = "1.7.0"
ROOT = Path(__file__).resolve().parent.parent  # the checkout: examples/, grids/, the stages
