"""A small LLaVA and the procedural visual-question world that it is trained and measured on."""
