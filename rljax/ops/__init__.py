"""Pure functions of arrays that losses and scripts share."""
