"""Jobs: work that outlives its caller's connection, kept in a folder and gone on with after any end."""
