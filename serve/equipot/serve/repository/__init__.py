"""A folder or bucket of versioned bundles: read, kept in step with what is served, labelled."""
