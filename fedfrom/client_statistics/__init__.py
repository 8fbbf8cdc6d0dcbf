"""Statistics that clients compute on their own data for merging methods: Gram matrices and Fisher diagonals.

Needs torch alone; PEFT's modules are recognised by their attributes. The functions leave the model as it was: modes,
gradients, hooks. `fedfrom.client.reply(statistics=)` sends what they return.
"""

from fedfrom.client_statistics.fisher_diagonals import fisher
from fedfrom.client_statistics.gram_matrices import collecting_gram, gram

__all__ = ["collecting_gram", "fisher", "gram"]
