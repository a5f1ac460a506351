"""The paper's experiments about the method itself (``d2net study``)."""
