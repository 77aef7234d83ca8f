"""What `parallax-gen report` works out and draws; the command is in cli/."""
