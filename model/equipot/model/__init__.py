"""The interatomic potential: structures, graphs, network, bundles. Knows nothing of training or serving."""
