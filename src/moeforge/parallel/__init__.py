"""Several processes as one: the mesh, the exchange of rows between experts, sharding, checkpoints, the launcher."""
