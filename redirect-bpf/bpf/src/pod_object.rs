// SPDX-License-Identifier: Apache-2.0
use aya::EbpfLoader;
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol};
use std::path::Path;

const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pod.bpf.o"));
/// The constant that tells a copy whose it is.
const CONSTANT: &str = "NETNS";

/// The programs of pods, to be loaded once for each.
///
/// `aya`'s loader sets constants too, but only those that live as long as itself, and a new loader for each pod reads the
/// types of the whole kernel, which nothing here is relocated against: 10 ms and 20 MB. So that the constant is written
/// into the object, and there is one loader.
#[derive(Debug)]
pub struct PodObject {
    loader: EbpfLoader<'static>,
    object: Vec<u8>,
    /// Where the constant lies in it.
    at: usize,
}

impl PodObject {
    /// `maps`: where the maps are pinned.
    /// # Errors
    /// What is missing in the object.
    pub fn open(maps: &Path) -> Result<Self, String> {
        let mut loader = EbpfLoader::new();
        prepare(&mut loader, maps);
        Ok(Self {
            loader,
            object: OBJECT.to_vec(),
            at: offset()?,
        })
    }

    /// The copy of one namespace.
    /// # Errors
    /// [`aya::EbpfError`].
    pub fn load(&mut self, cookie: u64) -> Result<aya::Ebpf, aya::EbpfError> {
        self.object[self.at..self.at + size_of::<u64>()].copy_from_slice(&cookie.to_ne_bytes());
        self.loader.load(&self.object)
    }
}

/// Nothing of ours is relocated against the kernel's types.
pub fn prepare(loader: &mut EbpfLoader<'_>, maps: &Path) {
    loader
        .btf(None)
        .allow_unsupported_maps()
        .default_map_pin_directory(maps);
}

fn offset() -> Result<usize, String> {
    let file: ElfFile64<'_> = ElfFile64::parse(OBJECT).map_err(|error| error.to_string())?;
    let missing = || format!("{CONSTANT} is not in the object");
    let symbol = file.symbol_by_name(CONSTANT).ok_or_else(missing)?;
    let section = (symbol.section_index())
        .and_then(|index| file.section_by_index(index).ok())
        .ok_or_else(missing)?;
    let (begin, length) = section.file_range().ok_or_else(missing)?;
    let end = symbol.address() + size_of::<u64>() as u64;
    if symbol.size() != size_of::<u64>() as u64 || end > length {
        return Err(format!("{CONSTANT} is no 64-bit number"));
    }
    usize::try_from(begin + symbol.address()).map_err(|_| missing())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constant_is_found_and_is_zero() {
        let at = offset().unwrap();
        assert_eq!(OBJECT[at..at + 8], [0; 8]);
        let file: ElfFile64<'_> = ElfFile64::parse(OBJECT).unwrap();
        let section = file.section_by_name(".rodata").unwrap();
        let (begin, length) = section.file_range().unwrap();
        assert!((begin..begin + length).contains(&(at as u64)));
    }
}
