"""Studies on accuracy, and the scripts that draw the pictures in docs."""
