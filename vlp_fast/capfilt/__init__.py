"""CapFilt: a captioner writes captions for web images, a filter removes those that do not describe them, the web's own among them.

Paper: Li et al., BLIP (2022), section 3.3 and figure 3: synthetic captions by nucleus sampling, and for original and synthetic captions
alike the word of the image-text matching head. The published code does not contain it.

::

    capfilt = CapFilt(blip, blip, tokenizer, CapFiltSettings())
    report = run_capfilt(capfilt, open_pairs("cc3m/{00000..00331}.tar"), "cc3m-capfilt")

A run that was killed goes on where it stopped, and with the same software and device the files it leaves are byte for byte those of a
run that was not. To that end random numbers follow from the seed and a pair's place in the data, and a batch never crosses a chunk.
"""

from vlp_fast.capfilt.engine import CapFilt, CapFiltSettings, Score, score_captions
from vlp_fast.capfilt.output import KeptCaption, ResumeError
from vlp_fast.capfilt.run import run_capfilt

__all__ = ["CapFilt", "CapFiltSettings", "KeptCaption", "ResumeError", "Score", "run_capfilt", "score_captions"]
