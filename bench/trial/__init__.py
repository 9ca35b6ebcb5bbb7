"""The study of training trials on real pairs of which a share is made bad."""
