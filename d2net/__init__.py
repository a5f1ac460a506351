"""D2-Net: weakly-supervised temporal action localization, with fast CPU and CUDA operators.

Operators live in :mod:`d2net.ops`, losses in :mod:`d2net.losses`; ``d2net --help`` lists the commands.
"""

__version__ = "0.1.0"
