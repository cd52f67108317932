"""A page as a tensor."""


def aimdo_to_tensor(alloc, device):
    vbar, index, size = alloc
    return vbar.pages[index].memory[:size]
