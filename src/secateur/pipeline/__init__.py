"""One run from a recipe: stages that write folders, each skipped where it is finished already."""
