"""What an installed package is, for tests: a module, and a folder that names its entry point."""


def installed(folder, text, module="toy_scale", group="secateur.methods"):
    """Write a package of one module; the folder has to be on the path."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(text)
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")
    return folder
