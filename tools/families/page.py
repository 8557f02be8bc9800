def text(results, schemes):
    return ""
