"""Two network namespaces of this machine that stand for two nodes with a link between them."""
