"""Where the arrays of a store may lie: memory-mapped files, an ADIOS2 file, the memory of a Ray cluster."""
