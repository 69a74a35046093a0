//! How puppet apply is run.

use kiln_model::lock::Provision;

use super::provision::{FILES, HOME, Program, quoted, socat};
use super::tools::{self, Recipe};

pub(crate) const PACKAGES: [&str; 1] = ["puppet-agent"];
const RUBY: &str = "kiln-ruby";
const RECIPE: Recipe<'static> = Recipe {
    programs: &[("usr/bin/ruby", RUBY), socat()],
    // Ruby has the paths of its libraries in itself.
    setting: "r=\n\
              for f in $t/usr/lib/ruby/vendor_ruby/[0-9]* $t/usr/lib/$m/ruby/vendor_ruby/[0-9]* $t/usr/lib/ruby/vendor_ruby \
              $t/usr/lib/ruby/[0-9]* $t/usr/lib/$m/ruby/[0-9]*; do r=$r:$f; done\n\
              export RUBYLIB=${r#:}\n\
              g=\n\
              for f in $t/usr/lib/ruby/gems/* $t/usr/lib/$m/ruby/gems/* $t/usr/share/rubygems-integration/* \
              $t/usr/lib/$m/rubygems-integration/*; do g=$g:$f; done\n\
              export GEM_PATH=${g#:}\n",
    prepare: ":",
};

pub(crate) fn program(provision: &Provision) -> Program {
    let tools = format!("{}/usr/bin", tools::INSIDE);
    let (host, file) = (quoted(&provision.host), quoted(&format!("{FILES}/{}", provision.file)));
    let hiera = match provision.files.iter().any(|file| file.dest == "/hiera.yaml") {
        true => format!("--hiera_config {FILES}/hiera.yaml"),
        false => String::new(),
    };
    Program {
        recipe: RECIPE,
        env: Vec::new(),
        told: Vec::new(),
        // It ends with 2 where it has changed something, and with 4 or 6 where something failed.
        functions: format!(
            "play() {{\n\
             ended=0\n\
             {tools}/{RUBY} {tools}/puppet apply --detailed-exitcodes --color false --certname {host} \
             --confdir {HOME}/conf --codedir {HOME}/code --vardir {HOME}/var --ssldir {HOME}/ssl --publicdir {HOME}/public \
             --logdir {HOME}/log --rundir {HOME}/run --modulepath {FILES}/modules {hiera} {file} || ended=$?\n\
             [ $ended = 0 ] || [ $ended = 2 ]\n\
             }}\n\
             changed() {{ [ $ended = 2 ]; }}"
        ),
        check: ":".to_owned(),
    }
}
