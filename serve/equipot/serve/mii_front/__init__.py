"""A front of DeepSpeed-MII before our engine, for sites whose tools are MII's. Nothing else depends on it."""
