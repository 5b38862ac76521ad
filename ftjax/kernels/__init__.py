"""Fused operations: each a public function, a reference in plain JAX, and bodies for the platforms where one pays."""
