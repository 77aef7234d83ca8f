"""Computes and draws the page of `parallax-gen report`; the command is in cli/."""
