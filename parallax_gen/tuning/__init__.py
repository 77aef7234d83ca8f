"""From not knowing to knowing: propose configs, compile, check and time them, and write down what came of each."""
