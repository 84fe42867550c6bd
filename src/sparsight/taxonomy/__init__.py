"""What kind of thing each latent stands for, layer by layer.

`classify` gives each latent of several SAEs a kind (colour, texture, part, object, scene, text,
position or none), `follow` links latents of consecutive layers, `write_taxonomy` writes both.
"""

from sparsight.taxonomy.classifying import LayerKinds, classify
from sparsight.taxonomy.deciding import Rule
from sparsight.taxonomy.evidence import Evidence
from sparsight.taxonomy.following import Edge, follow
from sparsight.taxonomy.kinds import KINDS, TRUTH_KINDS
from sparsight.taxonomy.measuring import Measures
from sparsight.taxonomy.writing import write_taxonomy

__all__ = [
    "KINDS",
    "TRUTH_KINDS",
    "Edge",
    "Evidence",
    "LayerKinds",
    "Measures",
    "Rule",
    "classify",
    "follow",
    "write_taxonomy",
]
