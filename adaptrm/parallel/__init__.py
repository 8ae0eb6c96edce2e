"""Meshes, shardings and processes."""

from adaptrm.parallel.mesh import local_mesh, make_mesh
from adaptrm.parallel.rows import read_leaves
from adaptrm.parallel.sharding import constrain, partition_spec, place, sharding

__all__ = ["constrain", "local_mesh", "make_mesh", "partition_spec", "place", "read_leaves", "sharding"]
