"""Two runs or more side by side: what their blends say of the same images."""
