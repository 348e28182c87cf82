"""How a network is built: its graph, blocks, layouts, head, and what it is wrapped in."""
