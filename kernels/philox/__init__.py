"""Counter-based random numbers: Philox4x32-10 uniforms and normals that depend on the scene's number, not on the
batch."""
