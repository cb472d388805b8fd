"""The labelling page: a server over one label store."""
